"""The load generators: how a client is attached to a server and what it does to it."""
