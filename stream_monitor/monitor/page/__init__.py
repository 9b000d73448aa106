"""The page that the monitor serves to browsers: `static/` is what runs there, the rest is what it asks.

Everything it shows comes through `MonitorService`, whose answers it gets as protobuf JSON.
"""
