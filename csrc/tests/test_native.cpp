// Runs every test of the core that needs no GPU. Made for sanitizers.
#include "suites.h"

int main() {
  const int failed = test_chunking() + test_engine() + test_schedule() + test_pace() + test_region() + test_digest() +
                     test_leaf_digest() + test_fingerprint();
  return failed == 0 ? 0 : 1;
}
