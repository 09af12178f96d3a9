"""The rungs L0 to L3 of the exactness ladder, walked on this machine: `recipes/validate.py`.

Every module compares bits and counts; what is compared is real work of the program's own parts.
"""
