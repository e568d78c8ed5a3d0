"""The HTTP server, its clients and the web page."""
