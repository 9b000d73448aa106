"""Many monitors as one: each publishes findings and closed traces to one stream on NATS JetStream, and interchangeable
processes read it whole and answer for all.

`outbox`, `sender` and `tombstones` run in a monitor; `reader`, `shelf` and `server` in a process of the fleet; `names`,
`messages` and `broker` are between them. Only `broker` knows NATS.
"""
