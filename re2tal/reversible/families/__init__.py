"""Families of blocks of other libraries, one file per library or kind of model.

`re2tal.reversible.branches.load_families` imports only the files for the library that defines a
given class, so no library is imported in vain.
"""
