// The typed errors of hxcomm. What they become in Python is decided by the bindings and the torch glue.
#pragma once

#include <exception>
#include <string>
#include <utility>

namespace hxcomm {

enum class ErrorKind : int {
  none = 0,
  peer_failed = 1,  // a peer died or left the group while this rank needed it
  mismatch = 2,     // the ranks called different operations; the group stays usable
  aborted = 3,      // abort() on some rank
  timeout = 4,      // an operation's deadline passed; the group is aborted
  init = 5,         // a group or a segment could not be set up
  usage = 6,        // the caller's mistake, found before anything was sent
  interrupted = 7,  // a signal handler raised (Ctrl-C) while this rank was blocked
};

class Error : public std::exception {
 public:
  Error(ErrorKind kind, std::string message) : kind_(kind), message_(std::move(message)) {}
  ErrorKind kind() const noexcept { return kind_; }
  const std::string& message() const noexcept { return message_; }
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  ErrorKind kind_;
  std::string message_;
};

}  // namespace hxcomm
