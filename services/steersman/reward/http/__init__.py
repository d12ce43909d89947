"""The reward server over HTTP, for systems that do not speak gRPC.

One file for each dialect that trainers and servers have come to speak; each only reads a JSON body into items and
writes scores back. `app` is what they share, `server` runs it beside the gRPC server.
"""
