"""The engine once more in plain NumPy: slow, short, from the papers, to test the fast code against."""
