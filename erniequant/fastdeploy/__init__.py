"""Checkpoints that FastDeploy serves: experts in WINT2 and wint4, everything else in wint8.

docs/fastdeploy.md describes the layout, and what of it is verified.
"""
