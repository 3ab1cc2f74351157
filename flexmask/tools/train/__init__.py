"""`flexmask train`: its options, and what it prints."""
