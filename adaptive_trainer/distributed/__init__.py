"""Several ranks that train one network: what they agree on, and the sum of their gradients. One rank does nothing here.

A rank that is out of memory must not leave its peers in a collective operation. So whatever can run out of memory has
no collective in it; then the ranks vote, and only where all are well do they exchange tensors that were made before. A
rank that fails votes too, and its peers take back what they have done as if the failure were theirs.
"""
