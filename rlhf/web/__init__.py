"""The base of the local servers: who may connect, what a browser may do, and how a server starts and ends."""
