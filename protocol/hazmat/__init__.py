"""Stop: the recipes are in `protocol.encryption` and `protocol.evaluation`; import from here only to build or to check those.

What is here, and what goes wrong with it:

* `ring`    compiled arithmetic on raw ciphertext words.  It checks nothing: a word that is not below its prime, or an array of the
            wrong shape, gives wrong results or reads outside its memory.  `EncryptedQuery` and `EncodedIndex` check what enters.
            Exact; a wrong bit here is a wrong score and never a leaked secret, since it sees no secret.
* `lanes`   the processor's instructions that `ring` and `seeds` are made of; `load` and `store` check no index.
* `seeds`, `packing`, `embedding`   how polynomials travel and how rows become some.  All input is public.
* `seal`    the only place that touches `tenseal`: secret keys, encryption, decryption.  Decrypted CKKS values carry noise that
            depends on the secret key: whoever sends them back to the party that made the ciphertext gives the key away in time.
* `masks`, `sharing`   secure aggregation's streams, boxes and shares.  A stream hides one vector, once; a share is as secret as its secret.
* `noise`   secret samples from the operating system for the specification's noise; its own docstring says what must never change.

Importing this package imports none of them: all but `noise`, `masks`, `sharing` and `seal` need `numba`, `seal` needs `tenseal`, and a
market has no `tenseal`.
"""
