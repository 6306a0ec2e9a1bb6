"""The server's end of lines: clients of this host and user, whose bodies are in shared memory. Calls are as by gRPC."""
