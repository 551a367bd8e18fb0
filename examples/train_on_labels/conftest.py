"""Being here puts this folder on the path of the tests below: they import the examples."""
