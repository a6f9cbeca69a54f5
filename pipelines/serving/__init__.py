"""The web page: safe uploads, a queue of generations and the HTTP interface, independent of Ray."""
