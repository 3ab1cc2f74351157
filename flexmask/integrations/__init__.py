"""flexmask inside other training frameworks: one file for each, which that framework alone imports."""
