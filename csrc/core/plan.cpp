#include "core/plan.h"

#include <algorithm>

#include "core/errors.h"
#include "core/line.h"

namespace hxcomm {
namespace {

constexpr int32_t kMagic = 0x48585031;
constexpr int32_t kVersion = 2;
constexpr size_t kHeaderWords = 16;
constexpr int32_t kMaxOperands = 65535;

class Reader {
 public:
  Reader(const std::vector<int32_t>& words, size_t first, const std::string& algorithm)
      : words_(words), at_(first), next_(first), algorithm_(algorithm) {}

  int32_t next() {
    at_ = next_++;
    if (at_ >= words_.size()) fail("ends in the middle of an instruction");
    return words_[at_];
  }

  int32_t next_in(int32_t low, int32_t high, const char* what) {
    const int32_t value = next();
    if (value < low || value > high)
      fail(std::string(what) + " is " + std::to_string(value) + ", allowed are " + std::to_string(low) + " to " +
           std::to_string(high));
    return value;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::usage, "the plan of algorithm '" + algorithm_ + "' is not valid: at word " +
                                      std::to_string(at_) + ": " + what);
  }

 private:
  const std::vector<int32_t>& words_;
  size_t at_;  // the word read last: the one that an error names
  size_t next_;
  const std::string& algorithm_;
};

int32_t chunks_of(const Plan& plan, BufferKind buffer) {
  if (buffer == BufferKind::scratch) return plan.scratch_chunks;
  if (buffer == BufferKind::message) return plan.messages;
  const Layout& layout = buffer == BufferKind::input ? plan.input : plan.output;
  return layout.blocks * layout.pieces;
}

void note_block(Plan& plan, int32_t rank, BufferKind buffer, int32_t chunk) {
  if (buffer == BufferKind::scratch || buffer == BufferKind::message) return;
  const bool input = buffer == BufferKind::input;
  int32_t& blocks = (input ? plan.input_blocks : plan.output_blocks)[static_cast<size_t>(rank)];
  blocks = std::max(blocks, chunk / (input ? plan.input : plan.output).pieces + 1);
}

Operand read_operand(Reader& reader, Plan& plan, bool source) {
  Operand operand{};
  operand.rank = reader.next_in(0, plan.world_size - 1, "a location's rank");
  operand.buffer = static_cast<BufferKind>(reader.next_in(0, plan.crosses ? 3 : 2, "a location's buffer"));
  operand.chunk = reader.next_in(0, chunks_of(plan, operand.buffer) - 1, "a location's chunk");
  operand.mark = static_cast<Mark>(reader.next_in(0, 2, "a location's mark"));
  const bool message = operand.buffer == BufferKind::message;
  if (message && (operand.rank == plan.rank) != source)
    reader.fail("a rank reads the messages that it receives, and stores to those that it sends");
  if (plan.is_private && operand.rank != plan.rank && operand.buffer != BufferKind::scratch && !message)
    reader.fail("a private plan may touch only the scratch of other ranks");
  if (operand.mark == Mark::partial && ((operand.buffer != BufferKind::scratch && !message) || !plan.partials))
    reader.fail("a partial result may only lie in scratch or a message, and the header must say so");
  note_block(plan, operand.rank, operand.buffer, operand.chunk);
  return operand;
}

Instruction read_transfer(Reader& reader, Plan& plan) {
  Instruction in{};
  in.code = Instruction::Code::transfer;
  in.reduce = reader.next_in(0, 1, "reduce") == 1;
  in.final = reader.next_in(0, 1, "final") == 1;
  in.count_buffer = static_cast<BufferKind>(reader.next_in(0, 1, "a count's buffer"));
  in.count_chunk = reader.next_in(0, chunks_of(plan, in.count_buffer) - 1, "a count's chunk");
  note_block(plan, plan.rank, in.count_buffer, in.count_chunk);
  in.n_sources = static_cast<uint16_t>(reader.next_in(1, in.reduce ? kMaxOperands : 1, "the number of sources"));
  in.n_destinations = static_cast<uint16_t>(reader.next_in(1, kMaxOperands, "the number of destinations"));
  in.first_operand = static_cast<uint32_t>(plan.operands.size());
  for (int i = 0; i < in.n_sources + in.n_destinations; ++i)
    plan.operands.push_back(read_operand(reader, plan, i < in.n_sources));
  const auto* operands = &plan.operands[in.first_operand];
  for (const Operand* to = operands + in.n_sources; to != operands + in.n_sources + in.n_destinations; ++to) {
    in.sends |= to->buffer == BufferKind::message;
    in.stores |= to->buffer == BufferKind::input || to->buffer == BufferKind::output;
  }
  if (!in.reduce && operands[0].mark == Mark::fresh) plan.moves_contributions |= in.stores;
  return in;
}

// Returns the number of rounds.
int32_t read_header(Plan& plan) {
  Reader header(plan.words, 0, plan.algorithm);
  header.next_in(kMagic, kMagic, "the magic number");
  header.next_in(kVersion, kVersion, "the plan version");
  plan.world_size = header.next_in(1, 1 << 24, "the world size");
  plan.rank = header.next_in(0, plan.world_size - 1, "the rank");
  plan.input_blocks.resize(static_cast<size_t>(plan.world_size));
  plan.output_blocks.resize(static_cast<size_t>(plan.world_size));
  const int32_t rounds = header.next_in(1, static_cast<int32_t>(kMaxRounds), "the number of rounds");
  for (Layout* layout : {&plan.input, &plan.output}) {
    layout->blocks = header.next_in(0, 1 << 24, "the number of blocks");
    layout->pieces = header.next_in(1, 1 << 24, "the number of pieces");
    if (int64_t{layout->blocks} * layout->pieces > INT32_MAX) header.fail("more than 2^31 chunks");
  }
  plan.scratch_chunks = header.next_in(0, INT32_MAX, "the number of scratch chunks");
  const int32_t flags = header.next_in(0, 31, "the flags");
  plan.in_place = (flags & 1) != 0;
  plan.is_private = (flags & 2) != 0;
  plan.partials = (flags & 8) != 0;
  plan.crosses = (flags & 16) != 0;
  for (int word = 11; word < 15; ++word) header.next();
  plan.messages = header.next_in(0, plan.crosses ? 1 << 24 : 0, "the number of messages");
  return rounds;
}

}  // namespace

Plan Plan::decode(std::vector<int32_t> words, uint64_t hash, std::string algorithm) {
  Plan plan;
  plan.hash = hash;
  plan.algorithm = std::move(algorithm);
  plan.words = std::move(words);
  const int32_t rounds = read_header(plan);
  Reader reader(plan.words, kHeaderWords, plan.algorithm);
  bool entered = false, agreed = false;
  for (;;) {
    Instruction in{};
    switch (reader.next_in(0, plan.crosses ? 6 : 4, "an instruction's code")) {
      case 0:
        if (!entered) reader.fail("ends before ENTER");
        if (plan.crosses && !agreed) reader.fail("ends before AGREE, though it crosses hosts");
        plan.instructions.push_back(in);
        return plan;
      case 1:
        in = read_transfer(reader, plan);
        if (in.sends && !entered) reader.fail("sends a message before ENTER");
        if (in.stores && plan.crosses && !agreed) reader.fail("stores to an input or output before AGREE");
        break;
      case 2:
        if (entered) reader.fail("a second ENTER");
        entered = true;
        in.code = Instruction::Code::enter;
        break;
      case 3:
        if (!entered) reader.fail("a WAIT before ENTER");
        in.code = Instruction::Code::wait;
        in.peer = reader.next_in(0, plan.world_size - 1, "a wait's peer");
        in.round = static_cast<uint32_t>(reader.next_in(1, rounds - 1, "a wait's round"));
        break;
      case 5:
        if (!entered) reader.fail("a RECEIVE before ENTER");
        in.code = Instruction::Code::receive;
        in.peer = reader.next_in(0, plan.world_size - 1, "a message's sender");
        in.number = static_cast<uint32_t>(reader.next_in(0, plan.messages - 1, "a message's number"));
        break;
      case 6:
        if (!entered || agreed) reader.fail("an AGREE before ENTER, or a second one");
        agreed = true;
        in.code = Instruction::Code::agree;
        break;
      default:
        if (!entered) reader.fail("a PUBLISH before ENTER");
        in.code = Instruction::Code::publish;
        in.round = static_cast<uint32_t>(reader.next_in(1, rounds - 1, "a published round"));
    }
    plan.instructions.push_back(in);
  }
}

}  // namespace hxcomm
