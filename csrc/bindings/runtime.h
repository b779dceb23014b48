// What Python holds of this process: its end of the shared memory, its background thread, its wire.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "communicator/memory_api.h"
#include "communicator/progress.h"
#include "transport/endpoint.h"

namespace hxcomm {

// The process's end and the thread that advances its groups: they live and die together.
struct Runtime {
  std::shared_ptr<Endpoint> endpoint;
  std::shared_ptr<Progress> progress;
  MemoryApi memory;

  Runtime(size_t segment_bytes, int chips, size_t bytes_per_chip)
      : endpoint(std::make_shared<Endpoint>(segment_bytes, chips, bytes_per_chip)),
        progress(std::make_shared<Progress>(endpoint)),
        memory(memory_api(endpoint->arenas())) {
    progress->interrupted = [] {
      const pybind11::gil_scoped_acquire gil;
      return PyErr_CheckSignals() != 0;  // the exception stays set on this thread; who waits raises it
    };
  }
};

Nonce nonce_from(const std::string& bytes);  // throws Error{init} where these are not 16

void bind_wire(pybind11::class_<Runtime, std::shared_ptr<Runtime>>& runtime);
void bind_notes(pybind11::class_<Runtime, std::shared_ptr<Runtime>>& runtime);
void bind_simulation(pybind11::module_& m);

}  // namespace hxcomm
