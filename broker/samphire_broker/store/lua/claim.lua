-- claim: move messages from queue lists into a worker's in-flight hash.
-- KEYS  1 worker:<wid>   2 worker:<wid>:inflight   3 tried   4 cancelled:lately   5.. lists, in the order of service
-- ARGV  1 most messages   2 stop after so many bytes   3 largest message that is returned whole
--       4 number of the first claim   5.. for each list: how many it gives before the first gives more, and the
--       number of its group; then for each group, from 1, how many its lists give together
-- Returns 1 if there are tasks that were tried before, plus 2 if some were cancelled lately; then field, size, message,
-- field, size, message, …: of a message over ARGV[3] only the last 16 KB, which hold a kombu message's headers.
-- Nothing can fail between LTRIM and HSET: the hash's type is checked first, and once LTRIM, which needs no
-- memory, has written, HSET is let through though memory be full.
if redis.call('EXISTS', KEYS[1]) == 0 then
  return redis.error_reply('NOLEASE the lease of this worker has lapsed')
end
redis.call('HLEN', KEYS[2])
local CHUNK = 32 -- messages read at once, so that a few large ones do not fill the server's memory
local left, bytes_left, largest = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local number = tonumber(ARGV[4])
local reply, n = {redis.call('EXISTS', KEYS[3]) + 2 * redis.call('EXISTS', KEYS[4])}, 1
local lists = #KEYS - 4
local empty, room = {}, {}
for i = 5 + 2 * lists, #ARGV do
  room[#room + 1] = tonumber(ARGV[i])
end
local function take(key, most, group)
  while most > 0 and left > 0 and bytes_left > 0 and room[group] > 0 and not empty[key] do
    local asked = math.min(most, left, room[group], CHUNK)
    local page = redis.pcall('LRANGE', key, -asked, -1)
    local found = page.err and 0 or #page -- a key that is no list gives nothing
    empty[key] = found < asked
    local taken, fields = 0, {}
    while taken < found and bytes_left > 0 do
      local message = page[found - taken] -- the oldest stands at the right
      local field = string.format('%d:%s', number, key)
      local size = #message
      fields[2 * taken + 1], fields[2 * taken + 2] = field, message
      if size > largest then
        message = string.sub(message, -16384)
      end
      reply[n + 1], reply[n + 2], reply[n + 3] = field, size, message
      n, number, taken, bytes_left = n + 3, number + 1, taken + 1, bytes_left - #message
    end
    if taken == 0 then
      return
    end
    redis.call('LTRIM', key, 0, -taken - 1)
    redis.call('HSET', KEYS[2], unpack(fields))
    left, most, room[group] = left - taken, most - taken, room[group] - taken
  end
end
for i = 1, lists do
  take(KEYS[i + 4], tonumber(ARGV[2 * i + 3]), tonumber(ARGV[2 * i + 4]))
end
for i = 1, lists do -- what others left unused
  take(KEYS[i + 4], left, tonumber(ARGV[2 * i + 4]))
end
return reply
