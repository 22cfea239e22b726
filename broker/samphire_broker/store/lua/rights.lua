-- rights: what this user may not run. It touches no key.
-- ARGV  1 MessagePack: array of [command, argument, …]
-- Returns of each that it may not run its number, from 1; nothing on Redis before version 7, which cannot be asked.
local packed = ARGV[1]
local missing = {}
for n, command in ipairs(cmsgpack.unpack(packed)) do
  if denied({command}) then
    missing[#missing + 1] = n
  end
end
return missing
