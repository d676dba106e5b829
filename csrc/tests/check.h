// A check that is on in every build, and a runner that names the test that broke.
#pragma once

#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

#include "errors.h"

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) throw std::runtime_error("not true: " #condition + std::string(MOEVEMENT_HERE)); \
  } while (false)

#define CHECK_THROWS(Error, expression)                                                        \
  do {                                                                                         \
    bool thrown = false;                                                                       \
    try {                                                                                      \
      (void)(expression);                                                                      \
    } catch (const Error&) {                                                                   \
      thrown = true;                                                                           \
    }                                                                                          \
    if (!thrown) throw std::runtime_error(#expression " throws no " #Error + std::string(MOEVEMENT_HERE)); \
  } while (false)

// Returns 1 when the test fails.
inline int run_test(const char* name, void (*test)()) {
  // At once, so that the name of a test that hangs is the one after the last line.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  try {
    test();
    std::printf("ok   %s\n", name);
    return 0;
  } catch (const std::exception& problem) {
    std::printf("FAIL %s: %s\n", name, problem.what());
    return 1;
  }
}

#define RUN(test) run_test(#test, test)
