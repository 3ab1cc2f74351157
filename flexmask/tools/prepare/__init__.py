"""`flexmask prepare`: its options, and what it prints."""
