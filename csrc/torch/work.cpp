#include "torch/work.h"

#include <ATen/core/ivalue.h>
#include <torch/csrc/Exceptions.h>

#include "torch/errors.h"

namespace hxcomm::torch_glue {

// What a posted call holds: the Work it belongs to.
struct Work::Context {
  c10::intrusive_ptr<Work> work;

  static void on_finish(void* context, int kind, const char* message) {
    const std::unique_ptr<Context> self(static_cast<Context*>(context));
    self->work->call_ended(kind, message);
  }
};

Work::Work(int rank, c10d::OpType type, std::vector<at::Tensor> results)
    : c10d::Work(rank, type), results_(std::move(results)), ended_(true) {}

Work::Work(int rank, c10d::OpType type, const Api* api, void* group, std::vector<Tensors> calls)
    : c10d::Work(rank, type), api_(api), group_(api->retain(group)), calls_(std::move(calls)) {
  for (const Tensors& call : calls_)
    for (const at::Tensor& tensor : call.outputs()) results_.push_back(tensor);
  future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
  sequence_ = api_->sequence(group_);
}

Work::~Work() {
  for (void* op : ops_) api_->release_op(op);
  if (group_ != nullptr) api_->release(group_);
}

void Work::post(std::chrono::milliseconds timeout) {
  running_.store(static_cast<int>(calls_.size()));
  ops_.reserve(calls_.size());
  for (size_t i = 0; i < calls_.size(); ++i) {
    const ApiCall call = calls_[i].call(timeout);
    auto context = std::make_unique<Context>(Context{c10::intrusive_ptr<Work>::reclaim_copy(this)});
    void* op = nullptr;
    const int kind = api_->post(group_, &call, &Context::on_finish, context.get(), &op);
    if (kind != 0) {
      const std::string message = api_->message();
      running_.fetch_sub(static_cast<int>(calls_.size() - i - 1));
      call_ended(kind, message.c_str());
      throw_typed(kind, message);
    }
    context.release();  // on_finish owns it, and may have run already
    ops_.push_back(op);
  }
}

void Work::call_ended(int kind, const char* message) {
  if (kind != 0) {
    std::lock_guard lock(error_mutex_);
    if (error_kind_ == 0) {
      error_kind_ = kind;
      error_message_ = message;
    }
  }
  if (running_.fetch_sub(1) != 1) return;
  {
    std::lock_guard lock(error_mutex_);
    if (error_kind_ == 0)
      for (Tensors& call : calls_) call.copy_back();
  }
  ended_.store(true, std::memory_order_release);
  if (const std::exception_ptr error = exception())
    future_->setError(error);
  else
    future_->markCompleted(c10::IValue(results_));
  calls_.clear();  // whoever keeps the Work need not keep the inputs
}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  std::lock_guard lock(error_mutex_);
  if (!future_) {  // a sync call has ended before anybody asked; making a future for each would cost 0.3 us
    future_ = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
    future_->markCompleted(c10::IValue(results_));
  }
  return future_;
}

bool Work::isCompleted() { return ended_.load(std::memory_order_acquire); }

bool Work::isSuccess() const {
  std::lock_guard lock(error_mutex_);
  return ended_.load(std::memory_order_acquire) && error_kind_ == 0;
}

std::exception_ptr Work::exception() const {
  if (!ended_.load(std::memory_order_acquire)) return nullptr;
  try {
    rethrow();
  } catch (...) {
    return std::current_exception();
  }
  return nullptr;
}

void Work::rethrow() const {
  std::string message;
  int kind = 0;
  {
    std::lock_guard lock(error_mutex_);
    kind = error_kind_;
    message = error_message_;
  }
  if (kind != 0) throw_typed(kind, message);
}

bool Work::wait(std::chrono::milliseconds timeout) {
  if (!ended_.load(std::memory_order_acquire)) {
    const int64_t timeout_ns = timeout.count() > 0 ? std::chrono::nanoseconds(timeout).count() : -1;
    for (void* op : ops_) {
      const int kind = api_->wait(group_, op, timeout_ns);
      if (kind != 0) throw_typed(kind, api_->message());
    }
    // The op has ended, but its callback may still run on the thread that ended it (copying back, futures).
    future_->wait();
  }
  rethrow();
  return true;
}

void Work::abort() { api_->abort(group_, "Work.abort() was called"); }

}  // namespace hxcomm::torch_glue
