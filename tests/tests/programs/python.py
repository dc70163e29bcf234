# Runs tests of python3's own, and prints as JSON how many ran, and the names of those that failed.
import json, os, sys, unittest
from test import support

# What wants a network, or minutes of a processor, is left out.
support.use_resources = ()
os.makedirs("/data/work", exist_ok=True)
os.chdir("/data/work")
suite = unittest.defaultTestLoader.loadTestsFromNames(sys.argv[1:])
result = unittest.TextTestRunner(verbosity=1).run(suite)
failed = sorted({test.id().split(" (<")[0] for test, _ in result.failures + result.errors})
failed += [test.id() for test in result.unexpectedSuccesses]
print(json.dumps({"ran": result.testsRun, "skipped": len(result.skipped), "failed": failed}))
