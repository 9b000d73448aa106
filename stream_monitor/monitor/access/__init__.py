"""Who may do what: principals and their rights, TLS, and what stands before gRPC calls and HTTP requests.

`AccessInterceptor` (gRPC) and `AccessGate` (ASGI) say who asks; services then look at `rights.current()`.
"""
