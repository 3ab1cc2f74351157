"""flexmask inside other training frameworks: one file each, which that framework alone imports."""
