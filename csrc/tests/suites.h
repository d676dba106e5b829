// The native tests; each returns how many of its tests failed.
#pragma once

int test_chunking();
int test_engine();
int test_schedule();
int test_pace();
int test_region();
int test_digest();
int test_leaf_digest();
int test_fingerprint();
// On a GPU, part of test_cuda.
int test_cuda_digests(bool quick);
int test_cuda_pace();
int test_cuda_fingerprint();
