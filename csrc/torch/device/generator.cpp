#include "torch/device/generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>
#include <deque>
#include <vector>

#include "torch/device/memory.h"

namespace hxcomm::device {
namespace {

constexpr int64_t kShortState = 16;  // seed and offset: what DTensor reads and changes
constexpr size_t kSnapshots = 64;

at::CPUGeneratorImpl* host_impl(const at::Generator& generator) { return generator.get<at::CPUGeneratorImpl>(); }

// Its state, as torch.hx.get_rng_state() gives it, is (seed, numbers of 32 bits drawn since), as on CUDA. The generator
// itself is a sequential one, so going to an offset means drawing so many numbers (1 to 2 ns each), unless it is one of
// the last states that this process has asked for: those are kept whole.
class HxGenerator final : public c10::GeneratorImpl {
 public:
  explicit HxGenerator(int chip, uint64_t seed = c10::default_rng_seed_val)
      : GeneratorImpl(c10::Device(kHx, static_cast<c10::DeviceIndex>(chip)),
                      c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host_(at::detail::createCPUGenerator(seed)),
        anchor_(seed) {}

  const at::Generator& host() const { return host_; }

  void set_current_seed(uint64_t seed) override {
    host_.set_current_seed(seed);
    anchor_ = at::mt19937(seed);
    anchor_offset_ = 0;
  }
  uint64_t current_seed() const override { return host_.current_seed(); }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return current_seed();
  }
  void set_offset(uint64_t offset) override {
    at::mt19937 engine = anchor_;
    uint64_t at = anchor_offset_;
    if (offset < at) engine = at::mt19937(current_seed()), at = 0;
    for (; at < offset; ++at) engine();
    anchor_ = engine;
    anchor_offset_ = offset;
    auto* host = host_impl(host_);
    host->set_engine(engine);
    host->set_next_float_normal_sample(std::nullopt);
    host->set_next_double_normal_sample(std::nullopt);
  }
  // Counts by drawing again until the states agree.
  uint64_t get_offset() const override {
    const at::mt19937_data_pod target = host_impl(host_)->engine().data();
    const auto draw = [&](int numbers) {
      for (int i = 0; i < numbers; ++i) anchor_();
      anchor_offset_ += static_cast<uint64_t>(numbers);
      return anchor_.data();
    };
    // The state is renewed after every 624 numbers, which left_ counts down.
    at::mt19937_data_pod now = anchor_.data();
    now = draw((now.left_ - target.left_ + at::MERSENNE_STATE_N) % at::MERSENNE_STATE_N);
    while (now.next_ != target.next_ || now.state_ != target.state_) now = draw(at::MERSENNE_STATE_N);
    return anchor_offset_;
  }
  void set_state(const c10::TensorImpl& state) override {
    if (state.numel() != kShortState) {  // CPU's own kind
      host_.get<at::CPUGeneratorImpl>()->set_state(state);
      anchor_ = host_impl(host_)->engine();
      anchor_offset_ = 0;
      return;
    }
    uint64_t words[2];
    std::memcpy(words, state.data(), sizeof words);
    for (const Snapshot& snapshot : snapshots_) {
      if (snapshot.seed != words[0] || snapshot.offset != words[1]) continue;
      host_impl(host_)->set_state(*snapshot.host_state);
      anchor_ = host_impl(host_)->engine();
      anchor_offset_ = words[1];
      return;
    }
    set_current_seed(words[0]);
    set_offset(words[1]);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    const uint64_t words[2] = {current_seed(), get_offset()};
    const c10::impl::ExcludeDispatchKeyGuard plain(c10::autograd_dispatch_keyset_with_ADInplaceOrView);
    at::Tensor state = at::empty({kShortState}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
    std::memcpy(state.mutable_data_ptr(), words, sizeof words);
    snapshots_.push_back({words[0], words[1], host_impl(host_)->get_state()});
    if (snapshots_.size() > kSnapshots) snapshots_.pop_front();
    return state.getIntrusivePtr();
  }

 private:
  struct Snapshot {
    uint64_t seed, offset;
    c10::intrusive_ptr<c10::TensorImpl> host_state;
  };

  HxGenerator* clone_impl() const override {
    auto* copy = new HxGenerator(device().index(), current_seed());
    copy->host_ = host_.clone();
    copy->anchor_ = anchor_;
    copy->anchor_offset_ = anchor_offset_;
    return copy;
  }

  at::Generator host_;
  mutable at::mt19937 anchor_;  // the engine when it had drawn anchor_offset_ numbers
  mutable uint64_t anchor_offset_ = 0;
  mutable std::deque<Snapshot> snapshots_;
};

std::mutex default_host_mutex;  // of CPU's default generator, against other threads that borrow it

}  // namespace

const at::Generator& default_generator(int chip) {
  ensure_started();
  static const auto* generators = [] {
    auto* all = new std::vector<at::Generator>;
    for (int i = 0; i < memory().chips; ++i) all->push_back(at::make_generator<HxGenerator>(i));
    return all;
  }();
  if (chip < 0) chip = current_chip();
  TORCH_CHECK(chip < memory().chips, "there is no hx:", chip);
  return (*generators)[static_cast<size_t>(chip)];
}

at::Generator new_generator(int chip) { return at::make_generator<HxGenerator>(chip < 0 ? current_chip() : chip); }

at::Generator host_generator(const std::optional<at::Generator>& generator, int chip) {
  const at::Generator& from = generator.has_value() && generator->defined() ? *generator : default_generator(chip);
  TORCH_CHECK(from.device().type() == kHx, "Expected a 'hx' device type for generator but found '",
              from.device().type(), "'");
  return static_cast<HxGenerator*>(from.unsafeGetGeneratorImpl())->host();
}

BorrowedDefault::BorrowedDefault(int chip) : lock_(default_host_mutex), chips_(host_generator(std::nullopt, chip)) {
  exchange();
}

BorrowedDefault::~BorrowedDefault() { exchange(); }

void BorrowedDefault::exchange() {
  auto *a = host_impl(at::detail::getDefaultCPUGenerator()), *b = host_impl(chips_);
  const std::scoped_lock lock(a->mutex_, b->mutex_);
  const at::mt19937 engine = a->engine();
  const auto single = a->next_float_normal_sample();
  const auto twice = a->next_double_normal_sample();
  a->set_engine(b->engine());
  a->set_next_float_normal_sample(b->next_float_normal_sample());
  a->set_next_double_normal_sample(b->next_double_normal_sample());
  b->set_engine(engine);
  b->set_next_float_normal_sample(single);
  b->set_next_double_normal_sample(twice);
}

}  // namespace hxcomm::device
