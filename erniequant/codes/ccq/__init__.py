"""Baidu's CCQ codes, the decoders of WINT2, WINT2.5 and WINT2.75, and the K orders."""
