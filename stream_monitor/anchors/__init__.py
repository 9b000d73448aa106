"""What a chain of thought rests on, in plain numpy: sentences, the sentence matrix, vertical scores, shift detectors.

Definitions follow thought-anchors (interp-reasoning/thought-anchors); nothing here knows of gRPC or of vLLM.
"""
