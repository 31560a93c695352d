"""What `server.report` is made of."""
