"""`pointbook import`: read, sort and check events of a file, and send them."""
