"""flexmask inside axolotl, which finds the plugin by its entry point."""
