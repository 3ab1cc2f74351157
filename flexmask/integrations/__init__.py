"""flexmask inside other training frameworks: a folder each, which that framework alone imports."""
