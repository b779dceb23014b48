// Texts that a process leaves in its segment for processes that know where: how they meet without a store.
//
// A page of notes is written by its process only. What a reader finds there is another process's memory: the length is
// read once and checked, and the text is the reader's to validate.
#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>

#include "core/line.h"

namespace hxcomm {

struct alignas(64) Note {
  static constexpr size_t kTextBytes = 4096 - 16;

  BasicNoteTag<NativeAtomics> tag;
  uint64_t length;  // written before the tag, as the text
  char text[kTextBytes];

  // A reader of what stood here before may find a mixture: whoever writes makes sure that nobody needs it any more.
  void write(uint64_t about, std::string_view words) {
    tag.withdraw();
    length = words.copy(text, kTextBytes);
    tag.publish(about);
  }
  // Empty where the note is about something else.
  std::string read(uint64_t about) const {
    if (tag.about() != about) return {};
    const uint64_t claimed = length;
    return {text, static_cast<size_t>(std::min<uint64_t>(claimed, kTextBytes))};
  }
};
static_assert(sizeof(Note) == 4096);

struct NotePage {
  static constexpr size_t kNotes = 4;
  std::array<Note, kNotes> notes;
};

}  // namespace hxcomm
