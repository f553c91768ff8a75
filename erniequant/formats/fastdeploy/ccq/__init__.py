"""The encoder of WINT2."""
