"""The exactness ladder, walked on this machine by recipes/validate.py, and check=strict.

Every module compares bits and counts; what is compared is real work of the program's own parts.
"""
