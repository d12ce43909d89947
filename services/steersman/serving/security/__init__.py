"""Who may call what: TLS with certificates that are read again when they change, callers known by token or certificate,
and the role that each RPC asks for.
"""
