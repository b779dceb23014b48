// hxcomm's errors as Python sees them, also through c10d's Work.wait() and the dispatcher.
#pragma once

#include <string>

#include "communicator/api.h"

namespace hxcomm::torch_glue {

// Throws the exception for an ErrorKind: a class of hxcomm.errors (all derive from DistBackendError), a ValueError,
// or the exception that a signal handler has set. Takes the GIL where it needs it.
[[noreturn]] void throw_typed(ErrorKind kind, const std::string& message);
// For what a function of the API table has returned.
[[noreturn]] inline void throw_typed(int kind, const std::string& message) {
  throw_typed(static_cast<ErrorKind>(kind), message);
}

}  // namespace hxcomm::torch_glue
