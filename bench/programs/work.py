"""What a Python program does: objects, dictionaries, strings, big numbers, generators, regular expressions, JSON."""

import hashlib
import heapq
import json
import re
from fractions import Fraction


def queens(n, row=0, columns=0, left=0, right=0):
    if row == n:
        return 1
    free = ~(columns | left | right) & ((1 << n) - 1)
    count = 0
    while free:
        bit = free & -free
        free ^= bit
        count += queens(n, row + 1, columns | bit, (left | bit) << 1, (right | bit) >> 1)
    return count


class Node:
    def __init__(self, name):
        self.name, self.edges = name, []


def shortest(size):
    nodes = [Node(i) for i in range(size)]
    seed = 1
    for node in nodes:
        for _ in range(5):
            seed = seed * 6364136223846793005 + 1 & 0xFFFFFFFFFFFFFFFF
            node.edges.append((nodes[(seed >> 33) % size], (seed >> 20) % 100 + 1))
    best, heap = {}, [(0, 0)]
    while heap:
        distance, name = heapq.heappop(heap)
        if name in best:
            continue
        best[name] = distance
        for other, cost in nodes[name].edges:
            if other.name not in best:
                heapq.heappush(heap, (distance + cost, other.name))
    return sum(best.values())


def words(count):
    text = " ".join(hashlib.md5(str(i % 5000).encode()).hexdigest() for i in range(count))
    counted = {}
    for word in re.findall(r"\b[0-9a-f]*?[a-f]{3}[0-9a-f]*\b", text):
        counted[word] = counted.get(word, 0) + 1
    return json.loads(json.dumps(counted, sort_keys=True))


print(queens(8))
print(shortest(8000))
print(hashlib.sha256(json.dumps(sorted(words(20000).items())).encode()).hexdigest())
print(sum(Fraction(1, n) for n in range(1, 700)).numerator % 1000003)
print(pow(3, 10**600, 10**300 + 7) % 1000003)
print("%.12f" % sum((i ** 0.5) * (-1) ** i for i in range(200000)))
