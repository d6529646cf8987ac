// Makes recorded calls again in a process of their own, where a sanitizer watches: `replay SEED
// FILE ...` reads what replay() of __init__.py wrote, and adds what the memory then holds.
// Every tensor is a separate piece of memory here, and nothing else of its neighbourhood exists.
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>
#ifdef SIMT_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

extern "C" void simt_seed(unsigned seed);
extern "C" void simt_device(int capability, int max_cluster);
extern "C" const char* simt_error();

namespace {

FILE* file;

void read_bytes(void* to, size_t size) {
  if (size && fread(to, 1, size, file) != size) {
    fprintf(stderr, "replay: the file is too short\n");
    exit(2);
  }
}

uint64_t read_number() {
  uint64_t number;
  read_bytes(&number, sizeof(number));
  return number;
}

struct Span {
  uint64_t start, row_bytes, row_step, rows;  // where it was recorded
  char* memory;                               // where it is

  uint64_t extent() const { return rows ? (rows - 1) * row_step + row_bytes : 0; }
};

constexpr uint64_t kAlign = 256, kGap = 64;

Span read_span() {
  Span span{read_number(), read_number(), read_number(), read_number(), nullptr};
  const uint64_t ahead = kAlign + span.start % kAlign;
  const uint64_t size = (ahead + span.extent() + kGap + kAlign - 1) / kAlign * kAlign;
  char* all = static_cast<char*>(aligned_alloc(kAlign, size));
  memset(all, 0xff, size);
  span.memory = all + ahead;
#ifdef SIMT_ADDRESS
  __asan_poison_memory_region(all, size);
#endif
  for (uint64_t row = 0; row < span.rows; ++row) {
    char* to = span.memory + row * span.row_step;
#ifdef SIMT_ADDRESS
    __asan_unpoison_memory_region(to, span.row_bytes);
#endif
    read_bytes(to, span.row_bytes);
  }
  return span;
}

// A call's struct, with every address of recorded memory changed to where that memory is now.
std::vector<uint64_t> read_arguments(const std::vector<Span>& spans) {
  std::vector<uint64_t> words(read_number() / sizeof(uint64_t));
  read_bytes(words.data(), words.size() * sizeof(uint64_t));
  for (uint64_t& word : words) {
    for (const Span& span : spans) {
      if (word < span.start || word >= span.start + span.extent()) continue;
      word = reinterpret_cast<uint64_t>(span.memory) + (word - span.start);
      break;
    }
  }
  return words;
}

void call(const std::vector<Span>& spans) {
  std::string name(read_number(), ' ');
  read_bytes(name.data(), name.size());
  const std::vector<uint64_t> arguments = read_arguments(spans);
  auto* function = reinterpret_cast<int (*)(const void*)>(dlsym(RTLD_DEFAULT, name.c_str()));
  if (!function) {
    fprintf(stderr, "replay: no function %s\n", name.c_str());
    exit(2);
  }
  if (const int error = function(arguments.data())) {
    fprintf(stderr, "replay: %s returns %d: %s\n", name.c_str(), error, simt_error());
    exit(3);
  }
}

// One recording; what its memory holds in the end is written behind it.
void replay(const char* name) {
  file = fopen(name, "r+b");
  if (!file) {
    fprintf(stderr, "replay: cannot read %s\n", name);
    exit(2);
  }
  const int capability = int(read_number());
  simt_device(capability, int(read_number()));
  std::vector<Span> spans(read_number());
  for (Span& span : spans) span = read_span();
  for (uint64_t calls = read_number(); calls > 0; --calls) call(spans);
  fseek(file, 0, SEEK_CUR);  // between reading and writing
  for (const Span& span : spans) {
    for (uint64_t row = 0; row < span.rows; ++row) {
      fwrite(span.memory + row * span.row_step, 1, span.row_bytes, file);
    }
  }
  fclose(file);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    fprintf(stderr, "usage: replay SEED FILE ...\n");
    return 2;
  }
  simt_seed(unsigned(atoi(argv[1])));
  for (int i = 2; i < argc; ++i) replay(argv[i]);
}
