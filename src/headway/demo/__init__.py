"""The demo: batch work and urgent requests on a small KV pool, under two policies.

``load`` says what arrives when, ``run`` serves it, ``view`` shows it while it runs, ``report``
and ``picture`` show it afterwards, and ``show`` puts them together.
"""
