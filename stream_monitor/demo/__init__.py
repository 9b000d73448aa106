"""The demo: a real engine, a monitor and live reasoning on one screen.

It stands outside of the product: it drives both sides as a user would, through their commands and their public API.
"""
