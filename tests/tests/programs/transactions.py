# Writes transactions of five rows each, and tells each in /data/promised once it is to last.
import os, sqlite3

database = sqlite3.connect("/data/db", isolation_level=None, timeout=60)
database.execute("pragma synchronous = full")
promised = os.open("/data/promised", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
number = 0
while True:
    number += 1
    database.execute("begin immediate")
    for row in range(5):
        database.execute("insert into late values (?, ?, ?)", (number, row, "x" * 700))
    database.execute("commit")
    os.write(promised, b"%d\n" % number)
