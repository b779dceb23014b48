// See TorchCommBackend.hpp beside it.
#pragma once

#include <comms/torchcomms/TorchCommBackend.hpp>

namespace torch::comms {

class TorchCommFactory {
 public:
  using Maker = std::function<std::shared_ptr<TorchCommBackend>()>;
  static TorchCommFactory& get() {
    static TorchCommFactory factory;
    return factory;
  }
  void register_backend(const std::string& name, const Maker& maker) { makers.emplace(name, maker); }
  std::unordered_map<std::string, Maker> makers;
};

}  // namespace torch::comms
