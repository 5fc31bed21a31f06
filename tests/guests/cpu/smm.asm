; System management mode (Intel SDM vol. 3, chapter 31; AMD APM vol. 2, chapter 10): what the handler of an SMI finds, the
; saved state, what it may change there, and what waits meanwhile. SMIs come from the local APIC to itself.
%include "common.inc"
align 8
gdt:    usual_segments
gdt_end:
more:   ret

; How often handlers have run, what the next one is to do, and what it has found.
%define COUNT 0x9000
%define ACTION 0x9004
%define FOUND(n) (0x9010 + 4 * (n))
%define SAVED (0x30000 + 0xfe00)
%define APIC 0xfee00000
%define CHANGE 1
%define MOVE 2
%define BACK 3
%define SEND_NMI 4
%define SEND_SMI 5

; An SMI, before the instruction behind this.
%macro smi 0
        mov dword [APIC + 0x310], 0
        mov dword [APIC + 0x300], 0x4200
        jmp %%here
%%here:
%endmacro
; tells NAME, value: an SMI, then what is there.
%macro tells 2
        case %1
        mov eax, 0x12345678
        mov ecx, 0x9abcdef0
        smi
        mov ebx, %2
        end
%endmacro

start:  mov esp, STACK0
        call setup
        mov dword [APIC + 0xf0], 0x1ff
        mov dword [COUNT], 0
        mov dword [ACTION], 0
        mov edi, 0x38000
        call install
        mov edi, 0x48000
        call install

        tells "handlers run", [COUNT]
        tells "cr0", [FOUND(0)]
        tells "flags", [FOUND(1)]
        tells "cs", [FOUND(2)]
        tells "ds", [FOUND(3)]
        tells "ss", [FOUND(4)]
        tells "cr4", [FOUND(5)]
        tells "dr7", [FOUND(6)]
        tells "revision", [SAVED + 0xfc]
        tells "smbase", [SAVED + 0x100]
        tells "saved eax", [SAVED + 0x1f8]
        tells "saved ecx", [SAVED + 0x1f0]
        tells "saved esp", [SAVED + 0x1d8]
        tells "saved flags", [SAVED + 0x170]
        tells "saved efer", [SAVED + 0xd0]
        tells "saved dr6", [SAVED + 0x168]
        tells "saved dr7", [SAVED + 0x160]
        tells "saved es and attributes", [SAVED]
        tells "saved es limit", [SAVED + 4]
        tells "saved es base", [SAVED + 8]
        tells "saved cs and attributes", [SAVED + 0x10]
        tells "saved ss and attributes", [SAVED + 0x20]
        tells "saved tr and attributes", [SAVED + 0x90]
        tells "saved tr limit", [SAVED + 0x94]
        tells "saved tr base", [SAVED + 0x98]
        tells "saved gdtr base", [SAVED + 0x68]
        tells "saved idtr base", [SAVED + 0x88]

        case "saved eip"
        mov dword [APIC + 0x310], 0
        mov dword [APIC + 0x300], 0x4200
.next:  nop
        mov ebx, [SAVED + 0x178]
        sub ebx, .next
        end

        case "saved cr0"
        smi
        mov ebx, cr0
        xor ebx, [SAVED + 0x158]
        end

        case "eax after rsm"
        mov eax, 0x11223344
        smi
        mov ebx, eax
        end

        case "eax that the handler changed"
        mov dword [ACTION], CHANGE
        smi
        mov ebx, eax
        end

        case "cs of a handler that was moved"
        mov dword [ACTION], MOVE
        smi
        smi
        mov ebx, [FOUND(2)]
        end

        case "smbase there"
        mov ebx, [0x40000 + 0xff00]
        mov dword [ACTION], BACK
        smi
        end

        case "cs of a handler that was moved back"
        smi
        mov ebx, [FOUND(2)]
        end

        case "an smi in the handler"
        mov edi, [COUNT]
        mov dword [ACTION], SEND_SMI
        smi
        jmp .one
.one:   jmp .two
.two:   mov ebx, [COUNT]
        sub ebx, edi
        end

        case "an nmi in the handler"
        mov dword [FOUND(7)], 0
        mov dword [ACTION], SEND_NMI
        smi
        mov eax, [FOUND(7)]
        ud2
        end

        case "whether that nmi came after the handler's end"
        mov ebx, [FOUND(7)]
        end

        case "rsm outside"
        rsm
        end

        case "privilege 3"
        ring3 .user3
.user3:  mov eax, DATA3 | 3
        mov ds, eax
        smi
        mov eax, [SAVED + 0x10]
        int 0x30
        end

        case "privilege 3, saved ss"
        ring3 .user
.user:  mov eax, DATA3 | 3
        mov ds, eax
        smi
        mov eax, [SAVED + 0x20]
        int 0x30
        end
        power_off

install:
        mov esi, handler
        mov ecx, handler_end - handler
        rep movsb
        ret

bits 16
handler:
        mov eax, cr0
        mov [dword FOUND(0)], eax
        mov esp, 0x7000
        pushfd
        pop dword [dword FOUND(1)]
        xor eax, eax
        mov ax, cs
        mov [dword FOUND(2)], eax
        mov ax, ds
        mov [dword FOUND(3)], eax
        mov ax, ss
        mov [dword FOUND(4)], eax
        mov eax, cr4
        mov [dword FOUND(5)], eax
        mov eax, dr7
        mov [dword FOUND(6)], eax
        inc dword [dword COUNT]
        xor ebx, ebx
        xchg ebx, [dword ACTION]
        cmp bx, CHANGE
        je .change
        cmp bx, MOVE
        je .move
        cmp bx, BACK
        je .back
        cmp bx, SEND_NMI
        je .nmi
        cmp bx, SEND_SMI
        je .smi
        rsm
.change:
        mov dword [cs:0xfff8], 0xcafe0000
        rsm
.move:  mov dword [cs:0xff00], 0x40000
        rsm
.back:  mov dword [cs:0xff00], 0x30000
        rsm
.nmi:   mov dword [dword APIC + 0x310], 0
        mov dword [dword APIC + 0x300], 0x4400
        jmp .wait
.wait:  mov cx, 100
        loop $
        mov dword [dword FOUND(7)], 1
        rsm
.smi:   mov dword [dword APIC + 0x310], 0
        mov dword [dword APIC + 0x300], 0x4200
        jmp .end
.end:   rsm
handler_end:
bits 32
