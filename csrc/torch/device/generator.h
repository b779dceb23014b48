// Random numbers on hx: CPU's generator, one for each chip, so the same seed gives the same numbers as on CPU.
#pragma once

#include <ATen/core/Generator.h>

#include <mutex>

namespace hxcomm::device {

const at::Generator& default_generator(int chip);  // chip -1: the current one
at::Generator new_generator(int chip);

// The CPU generator that kernels draw from for this generator of hx; nullopt stands for the chip's default.
at::Generator host_generator(const std::optional<at::Generator>& generator, int chip);

// For operations that draw from CPU's default generator and take none as an argument (dropout): while this lives, that
// one is in the state of the chip's.
class BorrowedDefault {
 public:
  explicit BorrowedDefault(int chip);
  ~BorrowedDefault();
  BorrowedDefault(const BorrowedDefault&) = delete;
  BorrowedDefault& operator=(const BorrowedDefault&) = delete;

 private:
  void exchange();
  std::unique_lock<std::mutex> lock_;
  at::Generator chips_;
};

}  // namespace hxcomm::device
