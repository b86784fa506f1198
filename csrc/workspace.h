// Memory of a call. Included by every variant, and by who has kernels of one kind of CPU, within its namespace.

static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory of one call, on a cache line's edge: a register's load across one costs two.
struct Workspace {
  static constexpr int64_t LINE = 64;
  void *memory;
  explicit Workspace(int64_t bytes) : memory(aligned_alloc(LINE, (size_t)((bytes / LINE + 1) * LINE))) {}
  ~Workspace() { free(memory); }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;
};
