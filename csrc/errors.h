// Errors of the native core. Every message ends with the file and line that raised it: the core runs inside training
// jobs where a stack trace of a native thread is rarely at hand. Nothing here ends the process.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#define MOEVEMENT_TEXT_(x) #x
#define MOEVEMENT_TEXT(x) MOEVEMENT_TEXT_(x)
// " [csrc/file.cpp:42]", to be appended to a message.
#define MOEVEMENT_HERE (" [" __FILE__ ":" MOEVEMENT_TEXT(__LINE__) "]")

namespace moevement {

// A copy or the engine that makes copies cannot do what is asked. Python: EngineError.
class EngineError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A ticket was never given out, or its record is dropped by now. Python: KeyError.
class UnknownTicket : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// An object is used after it was closed. Python: ValueError, as for a closed file.
class ClosedError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// Memory cannot be unmapped while somebody still holds a view of it. Python: BufferError.
class InUseError : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

// A system call failed. Python: OSError with the same errno and file name.
class OsError : public std::runtime_error {
 public:
  OsError(int code, const std::string& what, std::string path)
      : std::runtime_error(what), code_(code), path_(std::move(path)) {}
  int code() const noexcept { return code_; }
  const std::string& path() const noexcept { return path_; }

 private:
  int code_;
  std::string path_;
};

}  // namespace moevement
