"""flexmask inside ms-swift: `python -m flexmask.integrations.swift` prints its plugin's path."""
