// What the profiler shows of a call.
#pragma once

#include <ATen/core/ivalue.h>
#include <ATen/record_function.h>

#include <memory>
#include <string>
#include <vector>

namespace hxcomm::torch_glue {

// One call from its begin to its end, on whichever threads these are.
using Event = std::shared_ptr<at::RecordFunction>;

// Begins "hxcomm:<name>", with the shapes of what shown() returns; the event ends at the latest with its last owner.
// Null where no profiler is on: then shown() is not called.
template <typename Shown>
Event begin_event(const char* name, const Shown& shown) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::USER_SCOPE);
  if (!callbacks) return nullptr;
  auto event = std::make_shared<at::RecordFunction>(std::move(*callbacks));
  // The profiler must not nest it into what the calling thread does, which may be over before the call is.
  event->_setAsync();
  const std::vector<c10::IValue> values = shown();
  event->before(std::string("hxcomm:") + name, c10::ArrayRef<const c10::IValue>(values.data(), values.size()));
  return event;
}

}  // namespace hxcomm::torch_glue
