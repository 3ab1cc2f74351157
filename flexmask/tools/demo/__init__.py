"""`flexmask demo`: its options, and what it prints."""
