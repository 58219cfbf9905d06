"""Families of blocks of other libraries, each in a file of its own.

A library is not imported to know its blocks: `re2tal.reversible.branches.load_families` reads only
the files of the library that a class at hand comes from.
"""
